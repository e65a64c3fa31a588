"""Equal-budget comparisons: methods × training seeds (× learning rates), summed up in one table.

A *cell* is one training: a method with a learning rate and a seed, in its own run folder.
"""
