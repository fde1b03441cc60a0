"""Programs, the device interface, the driver, running and comparing."""
