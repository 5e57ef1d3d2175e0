"""Before, across and after runs: plans, sweeps, comparisons, reports."""
