"""The network, written once; parallelism is given to it."""
