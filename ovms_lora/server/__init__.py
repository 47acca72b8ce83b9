"""HTTP: two dialects over one engine. Knows nothing of OpenVINO."""
