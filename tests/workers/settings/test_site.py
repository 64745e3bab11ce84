"""Site files: defaults without one, and every mistake told by name."""

import os
import re
import tomllib

import pytest

from vnet_core.errors import ConfigError
from workers.engines import clusters
from workers.engines.clusters import Engines, granted_cores, processors
from workers.engines.dask_address import DaskTls
from workers.settings.rules import NightRules
from workers.settings.site import Nightly, Site, load_site

WHOLE = """
root = "file:///srv/vnet"
dask_address = "tls://10.0.0.5:8786"
ray_address = "10.0.0.5:6379"
preprocess_workers = 6
segment_workers = 2
train_workers = 4
train_workers_max = 8
train_hang_s = 120.0
gpus_per_worker = 0.5
segment_cpus = 3
ray_wait_s = 300.0
case_limit_s = 900.0
batch_cases = 16
timezone = "Europe/Berlin"
ui_port = 4300
notify_url = "json://127.0.0.1:9000/told"

[[nightly]]
cohort = "liver"
model = "liver@v3"
cron = "30 2 * * *"
catch_up = "skip"
watch = true
watch_quiet_s = 20.0
success_by = "06:30"
most_failures = 5

[nightly.rules]
deadline = "06:00"
hours = 5.5
retries = 2
retry_delay_s = 10.0
quarantine_after = 4
review = "flagged"
deliver = "/srv/masks"
deliver_readers = "group"
challenger_share = 0.2

[[nightly]]
cohort = "spleen"
model = "spleen"

[retention]
nights_days = 400
results_days = 30
spares_days = 10
artifacts_days = 90
grace_hours = 30.0

[dask_tls]
ca_file = "/etc/vnet/ca.pem"
cert_file = "/etc/vnet/here.pem"
key_file = "/etc/vnet/here-key.pem"

[identity]
ids = "pseudonyms"
private = "/srv/private"
secret_file = "/etc/vnet/secret"
"""


def written(tmp_path, text: str):
    path = tmp_path / "site.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(tmp_path, text: str) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_site(written(tmp_path, text))
    return caught.value.code, str(caught.value)


def test_without_a_file_everything_is_on_this_machine():
    site = load_site(None)
    assert site == Site()
    assert site.root == "vnet-data"
    engines = site.engines
    assert (engines.dask_address, engines.ray_address) == (None, None)
    assert engines.cpus == engines.preprocess_workers == processors() >= 1
    assert (engines.segment_workers, engines.train_workers, engines.gpus_per_worker) == (1, 1, 0.0)


def test_an_empty_file_is_the_default(tmp_path):
    assert load_site(written(tmp_path, "")) == Site()


def test_every_key_is_read(tmp_path):
    site = load_site(str(written(tmp_path, WHOLE)))
    mapping = tomllib.loads(WHOLE)
    assert set(mapping) == set(Site.model_fields)
    nightly = mapping.pop("nightly")
    assert site.model_dump(exclude={"nightly"}) == mapping
    assert set(nightly[0]) == set(Nightly.model_fields)
    assert set(nightly[0]["rules"]) == set(NightRules.model_fields)
    assert site.nightly[0].model_dump() == nightly[0]
    assert site.nightly[1] == Nightly(**nightly[1])
    assert site.nightly[1].cron == "0 1 * * *"
    engines = site.engines
    assert engines == Engines(
        dask_address="tls://10.0.0.5:8786",
        dask_tls=DaskTls(ca_file="/etc/vnet/ca.pem", cert_file="/etc/vnet/here.pem", key_file="/etc/vnet/here-key.pem"),
        ray_address="10.0.0.5:6379",
        preprocess_workers=6,
        segment_workers=2,
        train_workers=4,
        train_workers_max=8,
        train_hang_s=120.0,
        cpus=processors(),
        gpus_per_worker=0.5,
        segment_cpus=3,
        ray_wait_s=300.0,
        case_limit_s=900.0,
    )


def test_an_unknown_key_names_the_nearest(tmp_path):
    code, message = refused(tmp_path, 'ray_adress = "x"')
    assert code == "site.unknown-key"
    assert "ray_adress is not a key of the site; the nearest is ray_address" in message


def test_an_unknown_key_of_the_identity_names_the_nearest(tmp_path):
    code, message = refused(tmp_path, '[identity]\nsecretfile = "/etc/vnet/secret"')
    assert code == "site.unknown-key"
    assert "identity.secretfile is not a key of the site; the nearest is identity.secret_file" in message


def test_an_unknown_key_of_the_certificates_names_the_nearest(tmp_path):
    code, message = refused(tmp_path, '[dask_tls]\ncafile = "/etc/vnet/ca.pem"')
    assert code == "site.unknown-key"
    assert "dask_tls.cafile is not a key of the site; the nearest is dask_tls.ca_file" in message


def test_an_unknown_key_of_a_night_names_the_nearest(tmp_path):
    code, message = refused(tmp_path, '[[nightly]]\ncohort = "a"\nmodel = "m"\nchron = "0 1 * * *"')
    assert code == "site.unknown-key"
    assert "nightly.0.chron is not a key of the site" in message
    assert re.search(r"the nearest is [a-z0-9.]*cron\b", message), message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ui_port = 70000", ["ui_port", "70000", "65535"]),
        ("ui_port = 0", ["ui_port", "(got 0)"]),
        ("segment_workers = 0", ["segment_workers", "(got 0)"]),
        ("batch_cases = 1001", ["batch_cases", "1000"]),
        ("gpus_per_worker = -1", ["gpus_per_worker", "-1"]),
        ("root = 5", ["root", "(got 5)"]),
        ("train_workers = 3\ntrain_workers_max = 2", ["train_workers_max 2", "train_workers 3"]),
        ('preprocess_workers = "all"', ["preprocess_workers", "'all'"]),
        ('[[nightly]]\ncohort = "a"', ["nightly.0.model"]),
        ('[identity]\nids = "initials"', ["identity.ids", "'names' or 'pseudonyms'", "'initials'"]),
    ],
)
def test_a_value_that_cannot_work_is_named(tmp_path, line, words):
    code, message = refused(tmp_path, line)
    assert code == "site.value"
    assert all(word in message for word in words), message


def test_a_file_that_is_no_toml_is_named_with_its_line(tmp_path):
    code, message = refused(tmp_path, "root = \nray_address")
    assert code == "site.toml"
    assert "site.toml" in message
    assert "line 1" in message


def test_a_file_in_another_encoding_is_no_toml(tmp_path):
    path = tmp_path / "site.toml"
    path.write_bytes('root = "/srv/Zürich"'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"site\.toml"):
        load_site(path)


@pytest.mark.parametrize("name", ["absent.toml", ""])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(ConfigError) as caught:
        load_site(tmp_path / name)
    assert caught.value.code == "site.missing"
    assert str(tmp_path) in str(caught.value)


def test_cores_are_shared_out_and_nobody_goes_without():
    engines = Engines(cpus=8, segment_workers=3, train_workers=16)
    assert engines.ray_cpus == 16, "a worker without a core would wait for ever"
    assert Engines(cpus=8, segment_workers=3).ray_cpus == 8
    assert engines.cpus_per_segment_worker == 2
    assert engines.cpus_per_train_worker == 1
    elastic = Engines(cpus=8, train_workers=2, train_workers_max=4)
    assert (elastic.ray_cpus, elastic.cpus_per_train_worker) == (8, 2)


def test_processors_are_those_this_process_may_use():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no processor affinity")
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert processors() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert processors() == len(allowed)


def test_a_container_with_a_limit_of_cores_has_no_more(tmp_path, monkeypatch):
    told = tmp_path / "cpu.max"
    monkeypatch.setattr(clusters, "CPU_SHARE", told)
    free = processors()
    for text, cores in (
        ("max 100000\n", free),
        ("100000 100000\n", 1),
        ("50000 100000\n", 1),
        ("9999900000 100000\n", free),
    ):
        told.write_text(text)
        assert processors() == cores, text
    assert granted_cores("250000 100000\n") == 2, "half a core computes for nobody"
    assert granted_cores("max 100000\n") is None
