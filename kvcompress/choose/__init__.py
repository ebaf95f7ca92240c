"""Moments -> what each site keeps: energies, costs of bits, the budget's allocation."""
