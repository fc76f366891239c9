"""The method: noise, orders, losses and likelihoods as pure functions."""
