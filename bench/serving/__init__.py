"""What bench_serving.py measures with: the mix, the load, the services beside the node."""
