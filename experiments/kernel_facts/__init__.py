"""Facts of a map's life that the other experiments rest on."""
