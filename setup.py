"""Packaging, driven by `settings.ini`; `nbdev_export` keeps `pyproject.toml` in step."""
import re, shlex, shutil
from configparser import ConfigParser
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
SHIPPED = ("data_manifest.yaml", "references.bib")   # kept at the top of the repository, carried inside the wheel


class build_with_manifest(build_py):
    def run(self):
        super().run()
        for name in SHIPPED:
            shutil.copy(name, Path(self.build_lib) / cfg["lib_path"])


EXTRAS = ("paper", "explorer", "words", "wheels", "hf", "adapters", "formats", "log", "docs", "dev")


def listed(key): return shlex.split(cfg.get(key, ""))


def readme():
    """README.md with links that work outside the repository, as on the page of a package index."""
    text = Path("README.md").read_text(encoding="utf-8")
    to_image = rf"\1({cfg['git_url']}/raw/{cfg['branch']}/"
    to_page = rf"\1({cfg['git_url']}/blob/{cfg['branch']}/"
    relative = r"\((?!https?:|mailto:|#)"
    text = re.sub(r"(!\[[^]]*\])" + relative, to_image, text)
    return re.sub(r"((?<!!)\[[^]]*\])" + relative, to_page, text)


setuptools.setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], license="Apache-2.0", url=cfg["git_url"],
    packages=setuptools.find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    classifiers=["Development Status :: 3 - Alpha", f"Intended Audience :: {cfg['audience']}",
                 f"Natural Language :: {cfg['language']}", "Programming Language :: Python :: 3",
                 "Topic :: Multimedia :: Sound/Audio :: Analysis"],
    package_data={cfg["lib_path"]: ["*.html"]}, install_requires=listed("requirements"), python_requires=">=" + cfg["min_python"],
    extras_require={k: listed(f"{k}_requirements") for k in EXTRAS},
    long_description=readme(), long_description_content_type="text/markdown",
    zip_safe=False, cmdclass={"build_py": build_with_manifest},
    entry_points={"console_scripts": listed("console_scripts"),
                  "act.tasks": ["words = act.words"],
                  "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)
