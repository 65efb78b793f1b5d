"""
This library's LIBERO for LeRobot's policies: ``lerobot-eval --env.discover_packages_path=opd_gym.integrations.lerobot
--env.type=opd_libero ...``. LeRobot imports the modules in here; the envs themselves do without it.
"""
