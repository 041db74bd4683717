"""The verifier: grades completions in processes that can be killed. It keeps no state."""
