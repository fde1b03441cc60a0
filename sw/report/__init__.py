"""Tables, timelines and plots of what was measured."""
