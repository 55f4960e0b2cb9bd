"""The resident service: device hosts, definitions, the control API.

Nothing here is a library for others; programs talk to the service through its socket (`mdevkit.client`). The service process
imports no plugin: parents live in host processes (`mdevkit_service.host`), which outlive it.
"""
