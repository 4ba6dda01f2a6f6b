"""What every loss family shares: backend choice, launching, layouts, reductions and device functions."""
