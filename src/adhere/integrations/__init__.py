"""Where adhere meets others: a reward for TRL's trainers, candidates from servers that speak OpenAI's protocol."""
