"""Pages for people: what a run did, what the model looked at. Each page is one file and needs nothing else."""
