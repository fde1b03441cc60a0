"""Area and clock of the accelerator and its blocks, by open synthesis tools from pip packages."""
