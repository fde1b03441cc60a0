"""The software: compiler, golden model, command-level simulator, driver, command line."""
