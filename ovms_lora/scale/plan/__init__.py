"""`ovms-lora plan`: how many replicas a load needs, by simulation. Knows neither OpenVINO nor Ray."""
