"""Methods compared: with one another and with the paper."""
