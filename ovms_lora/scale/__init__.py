"""Many replicas: where requests go, and how many replicas a load needs. Imports the server; nothing imports it."""
