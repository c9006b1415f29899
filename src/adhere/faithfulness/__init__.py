"""The bench of faithfulness: does a reward prefer what the passage supports?"""
