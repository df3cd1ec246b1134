"""Time, memory and exactness of the loss beside eager torch and other packages' implementations."""
