"""Text under secure computation, in one process or between parties."""
