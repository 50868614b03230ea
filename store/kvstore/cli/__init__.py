"""The ``kvstore`` command: starts a store on one machine, and looks into a running one."""
