"""Linear modules that read what is cut: their weights as matrices, and fitting them again in closed form."""
