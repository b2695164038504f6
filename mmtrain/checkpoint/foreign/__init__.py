"""Reading weights from other programs, without running code in them, and writing weights for them."""
