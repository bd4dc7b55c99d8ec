"""The container setup: docker-compose.yaml, Dockerfile, .dockerignore and the file of secrets, without a Docker engine.

``data/compose-spec.json`` is ``schema/compose-spec.json`` of the Go module github.com/compose-spec/compose-go/v2, v2.16.2,
unchanged (Apache-2.0, as the module's LICENSE says).
"""

from __future__ import annotations

import base64
import fnmatch
import json
import os
import re
import stat
import subprocess
import sys
from configparser import RawConfigParser
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

PROJECT = Path(__file__).parent.parent
COMPOSE, DOCKERFILE = PROJECT / "docker-compose.yaml", PROJECT / "Dockerfile"
MAKE_ENV = PROJECT / "scripts" / "make_env.py"
SCHEMA = PROJECT / "tests" / "data" / "compose-spec.json"
REQUIRED = {
    "AIRFLOW_API_SECRET_KEY",
    "AIRFLOW_FERNET_KEY",
    "AIRFLOW_JWT_SECRET",
    "AIRFLOW_UI_PASSWORD",
    "BROKER_PASSWORD",
    "MATERIALIZE_SERVE_TOKENS",
    "POSTGRES_PASSWORD",
    "VALKEY_PASSWORD",
}
#: It does its work and ends.
ONE_SHOT = {"airflow-init"}
#: Options without a default, from get_provider_info() of the Celery provider 3.26.0, which only the image has.
OF_CELERY = {("celery", "result_backend")}
#: The users of the images and of our Dockerfile; none of them is root.
USERS = {"50000:50000", "dynamodblocal", "postgres", "valkey"}


class Refused(Exception):
    """Compose would stop: a variable without which it must not start is missing."""


def interpolate(text: str, environment: dict[str, str]) -> str:
    """*text* as Compose sees it: ``$$``, ``${NAME}``, ``${NAME:-default}`` and ``${NAME:?message}``, one in another too."""
    done, at = "", 0
    while at < len(text):
        if text.startswith("$$", at):
            done, at = done + "$", at + 2
        elif text.startswith("${", at):
            end = closing(text, at)
            done, at = done + value(text[at + 2 : end], environment), end + 1
        else:
            assert text[at] != "$", f"unbraced variable in {text!r}"
            done, at = done + text[at], at + 1
    return done


def closing(text: str, start: int) -> int:
    """Where the brace is that closes the one of ``${`` at *start*."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if text[at] == "}" and depth == 0:
            return at
    raise AssertionError(f"an open brace in {text[start:]!r}")


def value(expression: str, environment: dict[str, str]) -> str:
    name, separator, rest = re.fullmatch(r"(\w+)(:-|:\?|)(.*)", expression, re.DOTALL).groups()
    found = environment.get(name, "")
    if found or not separator:
        assert found or name in environment, f"{name} has neither a value nor a default"
        return found
    if separator == ":?":
        raise Refused(f"{name}: {rest}")
    return interpolate(rest, environment)


def interpolated(node, environment):
    if isinstance(node, dict):
        return {key: interpolated(one, environment) for key, one in node.items()}
    if isinstance(node, list):
        return [interpolated(one, environment) for one in node]
    return interpolate(node, environment) if isinstance(node, str) else node


def read(text: str):
    """Compose reads YAML into plain values, with anchors and merges resolved."""
    return json.loads(json.dumps(yaml.safe_load(text)))


def make_env(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(MAKE_ENV), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def pairs(file: Path) -> dict[str, str]:
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture(scope="module")
def written():
    """The file as it is written."""
    return read(COMPOSE.read_text())


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What ``make env`` gives."""
    folder = tmp_path_factory.mktemp("env")
    assert make_env(folder).returncode == 0
    return pairs(folder / ".env")


@pytest.fixture(scope="module")
def compose(written, environment):
    """The file as Compose runs it after ``make env``."""
    return interpolated(written, environment)


@pytest.fixture(scope="module")
def services(compose):
    return compose["services"]


# The file ----------------------------------------------------------------------------------------------------------------


def test_file_is_valid_against_the_compose_specification(written, compose):
    validator = Draft202012Validator(json.loads(SCHEMA.read_text()))

    problems = [error.message for each in (written, compose) for error in validator.iter_errors(each)]

    assert problems == []
    assert "version" not in compose


def test_schema_refuses_what_is_no_compose_file(compose):
    validator = Draft202012Validator(json.loads(SCHEMA.read_text()))

    assert list(validator.iter_errors(compose | {"services": {"a": {"imag": "b"}}}))


def test_nothing_is_left_to_fill_in_after_make_env(written, environment):
    done = interpolated({key: written[key] for key in ("services", "volumes")}, environment)

    assert "${" not in re.sub(r"requirepass \$\{STORE_PASSWORD\}|maxmemory \$\{STORE_MEMORY\}", "", json.dumps(done))


@pytest.mark.parametrize("name", sorted(REQUIRED))
@pytest.mark.parametrize("given", [None, ""], ids=["missing", "empty"])
def test_start_is_refused_without_a_secret(written, environment, name, given):
    lacking = {key: one for key, one in environment.items() if key != name}
    lacking |= {} if given is None else {name: given}

    with pytest.raises(Refused, match=f"^{name}: run make env$"):
        interpolated(written["services"], lacking)


def test_every_name_that_must_be_given_is_a_secret_that_make_env_writes(environment):
    must = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))

    assert must == REQUIRED == environment.keys()


def test_no_secret_is_given_a_default():
    defaulted = set(re.findall(r"\$\{(\w+):?-", COMPOSE.read_text()))
    bare = set(re.findall(r"(?<!\$)\$\{(\w+)\}", COMPOSE.read_text()))

    assert not defaulted & REQUIRED
    assert bare == set()


def test_secrets_reach_only_the_services_that_need_them(services, environment):
    holders = {
        name: {service for service, one in services.items() if environment[name] in json.dumps(one)}
        for name in REQUIRED
    }
    airflow = {name for name in services if name.startswith("airflow-")}

    assert holders["AIRFLOW_UI_PASSWORD"] == {"airflow-init"}
    assert holders["AIRFLOW_JWT_SECRET"] == {"airflow-apiserver", "airflow-scheduler"}
    assert holders["AIRFLOW_FERNET_KEY"] == holders["AIRFLOW_API_SECRET_KEY"] == airflow
    assert holders["POSTGRES_PASSWORD"] == {"postgres"} | airflow
    assert holders["VALKEY_PASSWORD"] == {"valkey", "serve"} | airflow
    assert holders["MATERIALIZE_SERVE_TOKENS"] == {"serve"}
    assert holders["BROKER_PASSWORD"] == {"broker"} | airflow


def test_no_password_or_key_is_written_in_the_files(written):
    secretive = re.compile(r"pass|secret|token|fernet|credential|_key", re.IGNORECASE)
    asked_for = re.compile(r"\$\{\w+:\?run make env\}|/[\w./]+")  # or the path of a file
    literal = [
        (service, name)
        for service, one in written["services"].items()
        for name, given in one.get("environment", {}).items()
        if secretive.search(name) and given is not None and not asked_for.fullmatch(given)
    ]
    texts = COMPOSE.read_text() + DOCKERFILE.read_text()

    assert literal == []
    assert re.findall(r"://[^/\s:@]*:(?!\$\{\w+:\?)[^@\s]*@", texts) == [], "a password in a URL"
    assert re.findall(r"[0-9a-fA-F]{24,}|[A-Za-z0-9_-]{43}=", texts) == [], "something that looks like a key"
    assert not re.search(r"^(ARG|ENV)\b.*(pass|secret|token|key)", DOCKERFILE.read_text(), re.IGNORECASE | re.MULTILINE)


def test_no_port_is_published_beyond_this_machine(services):
    ports = [str(port) for one in services.values() for port in one.get("ports", [])]

    assert len(ports) == 4
    assert [port for port in ports if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)] == []
    assert [name for name, one in services.items() if "network_mode" in one] == []


def test_every_service_that_stays_up_is_watched_and_comes_back(services):
    for name, one in services.items():
        if name not in ONE_SHOT:
            assert one["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
            assert one["restart"] == "unless-stopped", name
            assert "curl" not in json.dumps(one["healthcheck"]), f"{name}: slim images have no curl"


def test_no_service_is_root_or_may_become_root(services):
    for name, one in services.items():
        assert one["user"] in USERS, name
        assert one["security_opt"] == ["no-new-privileges:true"], name
        assert one["cap_drop"] == ["ALL"], name
        assert not {"privileged", "cap_add", "pid", "devices"} & one.keys(), name


def test_every_service_that_is_waited_for_is_there_whenever_its_waiter_is(services):
    for name, one in services.items():
        for other, how in one.get("depends_on", {}).items():
            profiles = set(services[other].get("profiles", []))
            assert not profiles or profiles == set(one.get("profiles", [])), f"{name} waits for {other}"
            ends = how["condition"] == "service_completed_successfully"
            assert ends == (other in ONE_SHOT), f"{name} waits for {other}"
            assert ends or how["condition"] == "service_healthy", f"{name} waits for {other}"


def test_celery_has_two_workers_and_a_broker_in_its_profile_only(services):
    profiled = {name: one["profiles"] for name, one in services.items() if "profiles" in one}

    assert profiled == {
        "airflow-worker": ["celery"],
        "broker": ["celery"],
        "dynamodb": ["dynamodb"],
        "serve": ["serve"],
    }
    assert services["airflow-worker"]["deploy"]["replicas"] == 2


def test_executor_is_what_the_environment_says(written, environment, services):
    celery = interpolated(written["services"], environment | {"AIRFLOW_EXECUTOR": "CeleryExecutor"})

    for name in services.keys() - {"postgres", "valkey", "broker", "dynamodb", "serve"}:
        assert services[name]["environment"]["AIRFLOW__CORE__EXECUTOR"] == "LocalExecutor"
        assert celery[name]["environment"]["AIRFLOW__CORE__EXECUTOR"] == "CeleryExecutor"


def test_every_mounted_folder_is_in_the_repository_and_read_only(services, compose):
    for name, one in services.items():
        for mount in one.get("volumes", []):
            source, target, *mode = mount.split(":")
            if source.startswith("."):
                assert (PROJECT / source).is_dir(), f"{name} mounts {source}"
                assert mode == ["ro"], f"{name} mounts {source}"
            else:
                assert source in compose["volumes"], f"{name} mounts {source}"
            assert target.startswith("/")


def test_every_volume_is_used(services, compose):
    used = {mount.split(":")[0] for one in services.values() for mount in one.get("volumes", [])}

    assert set(compose["volumes"]) == {source for source in used if not source.startswith(".")}


def test_lake_may_be_a_folder_of_this_machine(written, environment):
    other = interpolated(written["services"], environment | {"MATERIALIZE_LAKE_DIR": "/data/lake"})

    assert "/data/lake:/opt/materialize/lake:ro" in other["airflow-scheduler"]["volumes"]


def test_another_store_takes_the_place_of_valkey(written, environment, services):
    url = "dynamodb://eu-central-1/fs?endpoint_url=http://dynamodb:8000"
    other = interpolated(written["services"], environment | {"MATERIALIZE_ONLINE_STORE": url})

    ours = services["airflow-scheduler"]["environment"]["MATERIALIZE_ONLINE_STORE"]
    assert ours == f"redis://:{environment['VALKEY_PASSWORD']}@valkey:6379/0"
    assert other["airflow-scheduler"]["environment"]["MATERIALIZE_ONLINE_STORE"] == url


def test_every_name_in_a_url_is_a_service(services):
    for one in services.values():
        for text in map(str, one.get("environment", {}).values()):
            for host in re.findall(r"://(?:[^@/\s]*@)?([\w.-]+):\d+", text):
                assert host in {*services, "localhost"}, text


def test_every_variable_that_a_service_reads_is_given_to_it(services):
    for name, one in services.items():
        scripts = json.dumps([one.get("command"), one.get("healthcheck")])
        read = set(re.findall(r"\$\{?(\w+)", scripts)) | set(re.findall(r'environ\[\\"(\w+)', scripts))
        assert read - {"HOSTNAME"} <= one.get("environment", {}).keys(), name
        if name in {"airflow-init", "broker", "valkey"}:
            assert len(read) == 2, name


@pytest.mark.parametrize("service", ["valkey", "broker"])
def test_stores_ask_for_a_password_keep_what_they_have_and_evict_nothing(services, service):
    script = services[service]["command"][-1]

    assert "requirepass ${STORE_PASSWORD}" in script
    assert "appendonly yes" in script
    assert "maxmemory-policy noeviction" in script


def test_password_of_the_ui_is_in_no_file_that_others_can_read(services):
    script = services["airflow-init"]["command"][-1]
    at = services["airflow-apiserver"]["environment"]["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"]

    assert script.index("umask 077") < script.index("write_text") < script.index(f" {at}")
    holders = [name for name, one in services.items() if "airflow-auth" in json.dumps(one.get("volumes", []))]
    assert sorted(holders) == ["airflow-apiserver", "airflow-init"]


@pytest.mark.airflow
def test_init_makes_a_passwords_file_that_airflow_reads(services, environment, tmp_path):
    script = services["airflow-init"]["command"][-1].replace("/opt/airflow/auth", str(tmp_path))
    script = script.replace("airflow db migrate\n", "")
    settings = services["airflow-init"]["environment"]
    given = os.environ | {"UI_USER": settings["UI_USER"], "UI_PASSWORD": settings["UI_PASSWORD"]}
    given["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    subprocess.run(["sh", "-euc", script], env=given, check=True)

    file = tmp_path / "passwords.json"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text()) == {"admin": environment["AIRFLOW_UI_PASSWORD"]}
    user = services["airflow-apiserver"]["environment"]["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS"]
    assert user == "admin:admin"


# Airflow's settings ------------------------------------------------------------------------------------------------------


def described() -> set[tuple[str, str]]:
    """Every option that the installed Airflow knows: its own, and those of the providers it has defaults for."""
    templates = Path(find_spec("airflow").submodule_search_locations[0]) / "config_templates"
    described = read((templates / "config.yml").read_text())
    options = {(section, name) for section, one in described.items() for name in one["options"]}
    fallback = RawConfigParser()
    fallback.read(templates / "provider_config_fallback_defaults.cfg")
    return (
        options | OF_CELERY | {(section, name) for section in fallback.sections() for name in fallback.options(section)}
    )


def test_airflow_knows_every_setting(services):
    names = {name for one in services.values() for name in one.get("environment", {})}
    split = {tuple(name.lower().split("__"))[1:] for name in names if name.startswith("AIRFLOW__")}

    assert len(split) > 15
    assert split - described() == set()


def test_a_typo_in_a_setting_would_be_seen():
    assert ("core", "execution_api_server_url") in described()
    assert ("core", "execution_api_url") not in described()


# The image ---------------------------------------------------------------------------------------------------------------


def sources() -> list[str]:
    """What the Dockerfile copies out of the repository."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE.read_text(), re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def excluded(path: str) -> bool:
    """Whether .dockerignore keeps *path* from the engine: the last line that fits decides, for a path or a folder above it."""
    out = False
    for line in (PROJECT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            folders = [path, *map(str, Path(path).parents)]
            names = [Path(one).name for one in folders] if "**/" in line else folders
            if any(one != "." and fnmatch.fnmatchcase(one, pattern) for one in names):
                out = not line.startswith("!")
    return out


def test_everything_that_is_copied_is_there_and_reaches_the_engine():
    assert len(sources()) == 5
    for source in sources():
        assert (PROJECT / source).exists(), source
        assert not excluded(source), source


def test_every_file_of_the_package_reaches_the_image():
    package = [path.relative_to(PROJECT) for path in (PROJECT / "materialize").rglob("*") if path.is_file()]

    kept = [path for path in package if not excluded(str(path))]

    assert {path.suffix for path in kept} >= {".py", ".lua"}
    assert [path for path in package if path not in kept and "__pycache__" not in path.parts] == []


@pytest.mark.parametrize(
    "path", [".env", ".env.local", ".git/config", ".venv/bin/python", "lake/part.parquet", "tests/test_compose.py"]
)
def test_secrets_history_and_lake_never_reach_the_engine(path):
    assert excluded(path)


def test_secrets_are_not_under_version_control():
    ignored = subprocess.run(["git", "check-ignore", "-q", ".env"], cwd=PROJECT, check=False)

    assert "/.env" in (PROJECT / ".gitignore").read_text().splitlines()
    assert ignored.returncode in (0, 128), "128: no git checkout"


def test_image_ends_as_the_user_that_the_services_have(services):
    last = DOCKERFILE.read_text().rpartition("\nFROM ")[2]

    (user,) = re.findall(r"^USER (.+)$", last, re.MULTILINE)
    assert {one["user"] for name, one in services.items() if name.startswith("airflow-")} == {user}
    assert f"useradd --uid {user.partition(':')[0]} " in last
    for tool in ("pip install", "uv ", "apt-get", "gcc"):
        assert tool not in last, f"{tool} in the final image"


def test_image_is_built_once_and_shared(services):
    airflow = {name: one for name, one in services.items() if name.startswith("airflow-")}

    assert [name for name, one in airflow.items() if "build" in one] == ["airflow-init"]
    assert len({one["image"] for one in airflow.values()}) == 1
    assert {one["pull_policy"] for one in airflow.values()} == {"never"}


def test_what_the_lock_lacks_is_pinned_and_nothing_else_is():
    install = DOCKERFILE.read_text().partition("python -m uv pip install")[2].partition("COPY")[0]
    words = re.findall(r"^ +([a-z0-9][\w.-]*)(==[\w.]+)? *\\?$", install, re.MULTILINE)
    locked = set(re.findall(r"^([a-z0-9-]+)==", (PROJECT / "requirements.txt").read_text(), re.MULTILINE))

    assert len(words) > 10
    assert [name for name, pin in words if not pin] == []
    assert {name for name, _ in words} & locked == set()
    assert "--constraint requirements.txt" in install


def test_image_has_the_python_that_the_lock_is_for():
    bases = set(re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(), re.MULTILINE))

    assert bases == {"python:3.11-slim-bookworm"}


# The secrets -------------------------------------------------------------------------------------------------------------


def test_make_env_writes_every_secret_for_its_owner_alone(tmp_path):
    told = make_env(tmp_path)

    file = tmp_path / ".env"
    secrets = pairs(file)
    assert told.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == [".env"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secrets.keys() == REQUIRED
    assert len(set(secrets.values())) == len(secrets)
    assert all(len(one) >= 36 for one in secrets.values())
    assert len(base64.urlsafe_b64decode(secrets["AIRFLOW_FERNET_KEY"])) == 32


def test_make_env_leaves_a_file_for_its_owner_alone_under_any_umask(tmp_path):
    code = f"import os, runpy, sys; os.umask(0); sys.argv = ['make_env.py']; runpy.run_path({str(MAKE_ENV)!r}, run_name='__main__')"

    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)

    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600


def test_make_env_prints_names_and_no_value(tmp_path):
    told = make_env(tmp_path)

    printed = told.stdout + told.stderr
    assert all(name in printed for name in REQUIRED)
    assert "grep AIRFLOW_UI_PASSWORD .env" in printed
    assert not any(one in printed for one in pairs(tmp_path / ".env").values())


def test_make_env_gives_other_secrets_each_time(tmp_path):
    made = []
    for name in ("one", "two"):
        make_env(tmp_path, name)
        made.append(pairs(tmp_path / name))

    assert not set(made[0].values()) & set(made[1].values())


def test_make_env_never_overwrites_unless_it_is_told_to(tmp_path):
    make_env(tmp_path)
    before = (tmp_path / ".env").read_bytes()

    again = make_env(tmp_path)
    assert (again.returncode, (tmp_path / ".env").read_bytes()) == (0, before)
    assert "left as it is" in again.stdout

    forced = make_env(tmp_path, "--force")
    assert forced.returncode == 0
    assert (tmp_path / ".env").read_bytes() != before


def test_make_env_says_what_an_older_file_lacks(tmp_path):
    (tmp_path / ".env").write_text("POSTGRES_PASSWORD=\nVALKEY_PASSWORD=mine\n")

    told = make_env(tmp_path)

    assert told.returncode == 1
    assert "POSTGRES_PASSWORD" in told.stderr
    assert "VALKEY_PASSWORD" not in told.stderr
    assert (tmp_path / ".env").read_text() == "POSTGRES_PASSWORD=\nVALKEY_PASSWORD=mine\n"


def test_secrets_need_no_quoting_in_a_url_or_in_the_file_of_secrets(environment):
    assert all(re.fullmatch(r"[A-Za-z0-9_=-]+", one) for one in environment.values())
    passwords = {name: one for name, one in environment.items() if name.endswith("PASSWORD")}
    assert all(one.isalnum() for one in passwords.values())


def test_make_env_is_a_target_with_a_line_of_help():
    assert re.search(r"^env:.*## .*\.env", (PROJECT / "Makefile").read_text(), re.MULTILINE)
