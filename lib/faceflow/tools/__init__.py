"""What reads finished runs or makes inputs: evaluate, diff, compare, plan, report, data sets."""
