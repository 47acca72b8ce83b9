"""What every other part shares: errors, names, configuration, requests. Imports nothing else of the package."""
