"""TensorRT 10 and 11: profiles, build, fingerprint and execution of engines.

Nothing here is imported unless an engine is asked for. The calls are type-checked against
tensorrt-stubs; the modules that make them say in their docstring that no engine was built or run
where this was written.
"""
