"""The Hessian of a loss at given weights: its products, eigenvalues, moments, and what follows from them."""
