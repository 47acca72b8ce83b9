from ovms_lora.scale.ray_environment import prefer_ray_environment

prefer_ray_environment()  # before a module here imports Ray
