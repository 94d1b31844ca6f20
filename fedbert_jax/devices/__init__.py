"""The machine: devices and how arrays lie on them, processes that train together, signals, choices for each backend."""
