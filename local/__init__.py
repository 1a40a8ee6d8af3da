"""Local mode: the whole service on one machine without Docker, as processes under one supervisor.

`make run` is `python -m local run`, `make demo` is `python -m local demo`. The end-to-end tests
start the same service through `local.service.Service`.
"""
