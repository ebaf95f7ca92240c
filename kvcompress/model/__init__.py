"""What a model is: its sites, its rotation, the numbers that its heads produce."""
