"""Preferences, from the pairs to what they teach: made, asked of a person, fitted to a reward model or to weights.

What is saved here is loaded in `adhere.reward`, which knows nothing of this package.
"""
