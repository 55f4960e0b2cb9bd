"""The tree of Linux's sysfs over the service's API, by FUSE: what lets mdevctl and libvirt, unmodified, manage our devices.

One process per mount, a client of the service like any other (``python -P -m mdevkit_service.sysfs DIR``; users come here through
``mdevkit sysfs mount``). From below: `calls` talks to the service, `view` remembers what there is, `tree` and the modules it
uses say what each path is, `filesystem` is what libfuse calls. Nothing here imports a plugin, or the service's own modules but
for `schema`.
"""
