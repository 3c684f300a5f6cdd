"""Settings: where each comes from, which source wins, and what is said when one makes no sense."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfaas.addresses import Address
from memfaas.client.session import Session, connect
from memfaas.config import (
    ROLES,
    BrokerSettings,
    ClientSettings,
    DonorSettings,
    Settings,
    load_settings,
    options,
)
from memfaas.errors import UsageError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without settings, whatever the machine has."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return folder


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(role: type[Settings], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load_settings(role, *args, **kwargs)
    return str(caught.value)


# --- sources and their precedence


def test_without_any_source_there_are_defaults(home: Path, tmp_path: Path) -> None:
    broker = load_settings(BrokerSettings, environ={})
    assert (broker.listen_host, broker.listen_port, broker.lease_ttl) == ("127.0.0.1", 7411, 30.0)
    assert broker.secret_file == home / ".config/memfaas/secret"

    donor = load_settings(DonorSettings, {"name": "n"}, environ={})
    assert (donor.memory, donor.headroom, donor.warm, donor.listen_host) == ("auto", 2**30, 2, None)
    assert donor.broker == Address("127.0.0.1", 7411)
    assert donor.runtime_dir == tmp_path / "run" / "memfaas"
    assert donor.home == tmp_path / "run" / "memfaas" / "n"

    client = load_settings(ClientSettings, environ={})
    assert (client.fabric, client.timeout, client.tenant) == ("auto", 10.0, None)


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "memfaas.toml", '[donor]\nmemory = "1GiB"\nheadroom = "2GiB"\nwarm = 3\nname = "here"\n')
    environ = {"MEMFAAS_DONOR_HEADROOM": "3GiB", "MEMFAAS_DONOR_WARM": "4"}
    donor = load_settings(DonorSettings, {"warm": 5, "name": None}, config=file, environ=environ)
    assert (donor.memory, donor.headroom, donor.warm, donor.name) == (1 << 30, 3 << 30, 5, "here")


def test_the_file_in_the_home_folder_is_read_unasked(home: Path) -> None:
    write(home / ".config/memfaas/memfaas.toml", '[client]\ntenant = "ada"\n')
    assert load_settings(ClientSettings, environ={}).tenant == "ada"


def test_the_environment_names_the_file_and_an_argument_wins_over_it(tmp_path: Path) -> None:
    environ = {"MEMFAAS_CONFIG": str(write(tmp_path / "a.toml", "[broker]\nlease_ttl = 1\n"))}
    assert load_settings(BrokerSettings, environ=environ).lease_ttl == 1
    other = write(tmp_path / "b.toml", '[broker]\nlease_ttl = "2s"\n')
    assert load_settings(BrokerSettings, config=other, environ=environ).lease_ttl == 2


def test_an_empty_variable_is_as_good_as_none() -> None:
    environ = {"MEMFAAS_TENANT": "", "MEMFAAS_CONFIG": ""}
    assert load_settings(ClientSettings, environ=environ).tenant is None


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMFAAS_TIMEOUT", "250ms")
    assert load_settings(ClientSettings).timeout == 0.25


def test_the_broker_variable_is_the_address_for_clients_and_donors() -> None:
    environ = {"MEMFAAS_BROKER": "node1:80"}
    assert load_settings(ClientSettings, environ=environ).broker == Address("node1", 80)
    assert load_settings(DonorSettings, environ=environ).broker == Address("node1", 80)
    environ["MEMFAAS_DONOR_BROKER"] = "node2:81"
    assert load_settings(ClientSettings, environ=environ).broker == Address("node1", 80)
    assert load_settings(DonorSettings, environ=environ).broker == Address("node2", 81)


@pytest.mark.parametrize("role", ROLES)
def test_one_variable_names_the_secret_of_every_role(role: type[Settings]) -> None:
    assert dataclasses.asdict(load_settings(role, environ={"MEMFAAS_SECRET_FILE": "/s"}))["secret_file"] == Path("/s")  # type: ignore[call-overload]


def test_the_address_may_name_the_secret() -> None:
    given_values = {"broker": "memfaas://node1:80?secret=/a", "secret_file": "/b"}
    assert load_settings(ClientSettings, given_values, environ={}).secret_path == Path("/a")
    assert load_settings(DonorSettings, given_values, environ={}).secret_path == Path("/a")
    assert load_settings(ClientSettings, {"secret_file": "/b"}, environ={}).secret_path == Path("/b")


def test_paths_in_the_file_start_at_its_folder(tmp_path: Path, home: Path) -> None:
    file = write(tmp_path / "etc/memfaas.toml", '[client]\nsecret_file = "key"\n[broker]\nsecret_file = "~/key"\n')
    assert load_settings(ClientSettings, config=file, environ={}).secret_file == tmp_path / "etc/key"
    assert load_settings(BrokerSettings, config=file, environ={}).secret_file == home / "key"


def test_a_donor_lends_memory_unless_it_has_a_folder_to_lend_files_in(tmp_path: Path) -> None:
    assert load_settings(DonorSettings, environ={}).backing is None
    assert load_settings(DonorSettings, environ={"MEMFAAS_DONOR_BACKING": "/scratch/m"}).backing == Path("/scratch/m")
    file = write(tmp_path / "etc/memfaas.toml", '[donor]\nbacking = "scratch"\n')
    assert load_settings(DonorSettings, config=file, environ={}).backing == tmp_path / "etc/scratch"


# --- what makes no sense


def test_an_unknown_key_is_named_with_its_file_and_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path / "m.toml", '[donor]\nmemroy = "1GiB"\n')
    message = refusal(DonorSettings, config=file, environ={})
    assert str(file) in message
    assert "'memroy' in [donor]" in message
    assert "nearest is 'memory'" in message


def test_an_unknown_key_of_another_role_is_not_overlooked(tmp_path: Path) -> None:
    file = write(tmp_path / "m.toml", '[donor]\nmemroy = "1GiB"\n')
    assert "'memroy'" in refusal(ClientSettings, config=file, environ={})


def test_an_unknown_section_is_named_with_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path / "m.toml", "[brokers]\nlease_ttl = 3\n")
    message = refusal(BrokerSettings, config=file, environ={})
    assert "section 'brokers'" in message
    assert "nearest is '[broker]'" in message


def test_a_key_outside_of_the_sections_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "m.toml", 'tenant = "ada"\n')
    assert "'tenant'" in refusal(ClientSettings, config=file, environ={})
    file = write(tmp_path / "m.toml", 'broker = "node1:7411"\n')
    assert "[broker]" in refusal(ClientSettings, config=file, environ={})


def test_an_unknown_argument_is_named_with_the_nearest() -> None:
    message = refusal(ClientSettings, {"fabrik": "shm"}, environ={})
    assert "'fabrik'" in message
    assert "nearest is 'fabric'" in message


@pytest.mark.parametrize("content", [b"[client\n", b"\xff\xfe", b"[client]\ntenant = 'a'\ntenant = 'b'\n"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "m.toml"
    file.write_bytes(content)
    assert str(file) in refusal(ClientSettings, config=file, environ={})


def test_a_file_that_was_asked_for_must_exist(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.toml")
    assert missing in refusal(ClientSettings, config=missing, environ={})
    assert missing in refusal(ClientSettings, environ={"MEMFAAS_CONFIG": missing})


def test_a_folder_is_no_settings_file(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal(ClientSettings, config=tmp_path, environ={})


def test_a_bad_value_is_named_by_the_place_it_came_from(tmp_path: Path) -> None:
    file = write(tmp_path / "m.toml", '[broker]\nlease_ttl = "soon"\n')
    message = refusal(BrokerSettings, config=file, environ={})
    assert message.startswith(f"{file}: [broker] lease_ttl: 'soon' is not a duration")

    message = refusal(BrokerSettings, environ={"MEMFAAS_BROKER_LEASE_TTL": "soon"})
    assert message.startswith("MEMFAAS_BROKER_LEASE_TTL: 'soon'")

    message = refusal(DonorSettings, environ={"MEMFAAS_BROKER": "node1:http"})
    assert message.startswith("MEMFAAS_BROKER: 'node1:http'")

    message = refusal(BrokerSettings, {"lease_ttl": "soon"}, environ={})
    assert message.startswith("lease_ttl: 'soon'")


@pytest.mark.parametrize(
    ("role", "name", "value"),
    [
        (BrokerSettings, "listen_host", "http://node1"),
        (BrokerSettings, "listen_host", ""),
        (BrokerSettings, "listen_port", 65536),
        (BrokerSettings, "listen_port", "-1"),
        (BrokerSettings, "listen_port", "http"),
        (BrokerSettings, "listen_port", 7411.0),
        (BrokerSettings, "listen_port", True),
        (BrokerSettings, "lease_ttl", 0),
        (BrokerSettings, "lease_ttl", "2d"),
        (BrokerSettings, "secret_file", ""),
        (BrokerSettings, "secret_file", 5),
        (BrokerSettings, "secret_file", "~nobody-of-this-name/secret"),
        (DonorSettings, "broker", "::1:7411"),
        (DonorSettings, "name", "../etc"),
        (DonorSettings, "name", ".hidden"),
        (DonorSettings, "name", "x" * 65),
        (DonorSettings, "memory", "1MiB"),
        (DonorSettings, "memory", "all"),
        (DonorSettings, "headroom", "-1GiB"),
        (DonorSettings, "warm", 65),
        (DonorSettings, "runtime_dir", "/" + "x" * 80),
        (ClientSettings, "tenant", "ada lovelace"),
        (ClientSettings, "fabric", "carrier-pigeon"),
        (ClientSettings, "timeout", 0),
        (ClientSettings, "timeout", "2h"),
    ],
)
def test_a_value_without_sense_is_refused_by_name(role: type[Settings], name: str, value: Any) -> None:
    if name != "name" and role is DonorSettings:
        assert refusal(role, {"name": "d", name: value}, environ={}).startswith(f"{name}: ")
        with pytest.raises(UsageError, match=f"^{name}: "):
            DonorSettings(**{"name": "d", name: value})
    else:
        assert refusal(role, {name: value}, environ={}).startswith(f"{name}: ")


def test_a_settings_object_reads_what_it_is_given_like_a_file() -> None:
    donor = DonorSettings(name="d", memory="512MiB", headroom="0", broker="node1")  # type: ignore[arg-type]
    assert (donor.memory, donor.headroom, donor.broker) == (512 << 20, 0, Address("node1", 7411))


def test_settings_cannot_be_changed() -> None:
    settings = load_settings(ClientSettings, environ={})
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.fabric = "tcp"  # type: ignore[misc]


# --- properties


@pytest.mark.parametrize("role", ROLES)
def test_every_setting_is_described_and_can_be_set_by_flag_file_and_environment(role: type[Settings]) -> None:
    described = options(role)
    assert [option.name for option in described] == [field.name for field in dataclasses.fields(role)]  # type: ignore[arg-type]
    for option in described:
        assert option.help.endswith(".")
        assert option.default
        assert option.flag.startswith("--")
        assert option.env
        assert all(name.startswith("MEMFAAS_") for name in option.env)


def test_no_two_settings_of_a_role_share_a_variable() -> None:
    for role in ROLES:
        names = [name for option in options(role) for name in option.env]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("role", ROLES)
def test_checked_settings_pass_the_check_again(role: type[Settings]) -> None:
    settings = load_settings(role, environ={})
    assert dataclasses.replace(settings) == settings  # type: ignore[type-var]


@given(
    memory=st.integers(2 << 20, 1 << 50) | st.just("auto"),
    headroom=st.integers(0, 1 << 50),
    warm=st.integers(0, 64),
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,8}\Z"),
)
def test_any_sensible_donor_can_be_written_as_environment(
    memory: int | str, headroom: int, warm: int, name: str
) -> None:
    values = {"memory": memory, "headroom": headroom, "warm": warm, "name": name, "runtime_dir": "/run/m"}
    environ = {f"MEMFAAS_DONOR_{key.upper()}": str(value) for key, value in values.items()}
    assert load_settings(DonorSettings, environ=environ) == load_settings(DonorSettings, values, environ={})


def test_connect_pins_the_rdma_device(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[ClientSettings] = []
    monkeypatch.setattr(Session, "open", opened.append)
    monkeypatch.setenv("MEMFAAS_DEVICE", "mlx5_0")
    connect("node1:7411", device="mlx5_1:2")
    connect("node1:7411")
    assert [one.device for one in opened] == ["mlx5_1:2", "mlx5_0"]
    with pytest.raises(UsageError, match="RDMA device"):
        connect("node1:7411", device="mlx5_1:port")
