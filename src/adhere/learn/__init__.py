"""How the policy changes: advantages, losses, algorithms, and the loop around them."""
