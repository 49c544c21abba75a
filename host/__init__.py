"""Sets up a real ComfyUI with this pack and talks to it: for quickstart.py, runtests.py, tests and benchmarks.

Standard library only, so that it runs on a bare Python; what needs more (`client.ComfyClient.run`)
imports it when called, inside the environment that `environment` has built.
"""
