"""A trained student as a folder for others: weights, card, chat template."""
