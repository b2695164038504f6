"""Reading weights of other programs, without running anything in them, and writing weights for them."""
