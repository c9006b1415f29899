"""What a response is worth: tensors in, numbers out. Start at `named`, where signals become rewards."""
