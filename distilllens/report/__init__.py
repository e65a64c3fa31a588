"""Reports: score tables, training curves, lens maps, and self-contained pages of them."""
