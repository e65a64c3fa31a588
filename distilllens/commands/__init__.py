"""Commands of ``python -m distilllens`` that belong to no other package."""
