"""Fronts: what a client of a device is really connected to, so that the device's process may die and be replaced.

A hypervisor neither reconnects to a vfio-user server nor forgives one that goes away. So, where a device shall survive, its
process is not the server. A *front* is: a process of our own code alone, which holds the client's connection, a copy of every
descriptor the client has given, and each request until it has been answered. The process of the device keeps its state in a
`Park` after every request. When it dies, the next one gets all that from the front and goes on in the middle.

Three kinds of process:

- the *porter*, one for each control socket (one per host process of the service): it holds the listening sockets of devices
  nobody uses, forks a front when somebody connects, and brings fronts and the processes of their devices together;
- a *front*, one for each device that is in use;
- the process of the device, with a `mdevkit_vfio.transport.ParkedServer` for each device.

Between them: `porter` and its registrations speak JSON on SOCK_SEQPACKET (`control`); a front and a device's process speak
vfio-user itself, with a few commands of our own and a turn number in a field that commands do not use (`wire`). `journal` is
what a front remembers of a client's configuration; `session` is the other end of a front's connection.
"""
