"""Docker-style port mapping for containerd.

The way of the data, one direction and no way back:

    containerd -> endpoints -> publish -> rules -> firewall

``reconcile`` joins these rooms; ``cli`` is the door.
"""

__version__ = "0.1.0"
