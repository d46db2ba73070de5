"""The CUDA path: the same model and sessions as the CPU's, on kernels compiled at run time.

`model` (the same calls as the core's `Model`) -> `plan` (which kernels, over which buffers) -> a
`machine.Machine` that runs them: a GPU, or in tests the kernels' own source compiled for the host.
"""
