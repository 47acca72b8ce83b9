from ovms_lora.scale.config import prefer_ray_environment

prefer_ray_environment()  # before a module here imports Ray
