#!/usr/bin/env bash
# Build the Dockerfile and use it: a run in a container is stopped by SIGTERM, as a preemption would, and resumed in a
# second container over the same volume; the weights are those of a run that nobody disturbed.
#
# Needs buildah (no daemon, no root in the image). BASE: a base image; without one, and without a registry in reach, a
# minimal Debian is made by debootstrap. TORCH: which torch to install. PIP_FLAGS: more flags for `buildah build`, such as
# --volume /some/wheels:/some/wheels:ro.
set -euo pipefail
cd "$(dirname "$0")/.."

export BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot} STORAGE_DRIVER=${STORAGE_DRIVER:-vfs}
TORCH=${TORCH:-torch}
SUITE=${SUITE:-bookworm}
work=$(mktemp -d "${TMPDIR:-/tmp}/lampctl-docker-check.XXXXXX")
containers=()

clean_up() {
    for container in "${containers[@]}"; do buildah rm "$container" >/dev/null 2>&1 || true; done
    rm -rf "$work"
}
trap clean_up EXIT

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'docker-check: %s\n' "$*" >&2; exit 1; }

command -v buildah >/dev/null || fail "buildah is missing (Debian: apt-get install buildah debootstrap)"

if [ -z "${BASE:-}" ]; then
    BASE=localhost/lampctl-base
    if ! buildah inspect --type image "$BASE" >/dev/null 2>&1; then
        say "a base image by debootstrap"
        command -v debootstrap >/dev/null || fail "debootstrap is missing, or name an image by BASE=..."
        debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$SUITE" "$work/rootfs" >"$work/debootstrap.log" 2>&1 \
            || { tail -5 "$work/debootstrap.log"; fail "debootstrap failed"; }
        scratch=$(buildah from scratch)
        containers+=("$scratch")
        buildah add --quiet "$scratch" "$work/rootfs" / >/dev/null
        buildah config --cmd bash "$scratch"
        buildah commit --quiet "$scratch" "$BASE" >/dev/null
        rm -rf "$work/rootfs"
    fi
fi

say "building the image on $BASE"
start=$(date +%s)
# shellcheck disable=SC2086 # the flags are words
buildah build --quiet --layers=false --build-arg "BASE=$BASE" --build-arg "TORCH=$TORCH" ${PIP_FLAGS:-} --tag localhost/lampctl . >/dev/null
echo "built in $(($(date +%s) - start)) s"
buildah inspect --type image --format '{{.Docker.Config.User}} {{.Docker.Config.Entrypoint}} {{.Docker.Config.StopSignal}}' localhost/lampctl \
    | tee "$work/config"
grep -q '^10001:10001 \[lampctl\] SIGTERM' "$work/config" || fail "the image has another user, entry point or stop signal"

mkdir -p "$work/volume" "$work/quiet"
chmod 777 "$work/volume" "$work/quiet"
cp -r examples/tiny-opt "$work/volume/model"
cp -r examples/tiny-opt "$work/quiet/model"
chmod -R a+rX "$work/volume" "$work/quiet"

# As PID 1 of a namespace of its own where the system allows it, as it is in Docker.
in_container() { # VOLUME ARGUMENTS...
    local volume=$1; shift
    buildah run --volume "$volume:/work:rw" --user 10001:10001 "$container" -- "$@"
}
container=$(buildah from localhost/lampctl)
containers+=("$container")

say "lampctl --version"
in_container "$work/quiet" lampctl --version
in_container "$work/quiet" sh -c 'test "$(id -u)" = 10001' || fail "it runs as another user"

flags=(run model --sparsity 0.6 --calibration pydocs --num-samples 16 --seqlen 128 --epochs 3 --evaluate '' --run-dir run)
say "an undisturbed run"
in_container "$work/quiet" lampctl "${flags[@]}"

say "a run that is stopped by SIGTERM in the middle"
# The container's first process is the shell that becomes lampctl: what Docker's stop signal reaches.
in_container "$work/volume" sh -c 'echo $$ > pid; exec lampctl "$@"' lampctl "${flags[@]}" >"$work/first.log" 2>&1 &
first=$!
for _ in $(seq 600); do
    [ "$(find "$work/volume/run/commits" -name '*.json' 2>/dev/null | wc -l)" -ge 5 ] && break
    kill -0 $first 2>/dev/null || break
    sleep 0.05
done
target=$(pgrep -f "lampctl run model .*--run-dir run$" | tail -1)
kill -TERM "$target"
status=0; wait $first || status=$?
tail -2 "$work/first.log"
[ "$status" = 75 ] || fail "it ended with $status, not 75"
[ ! -d "$work/volume/run/model" ] || fail "it was finished already: nothing was shown"

say "resumed in a second container over the same volume"
container=$(buildah from localhost/lampctl)
containers+=("$container")
in_container "$work/volume" lampctl resume run

for name in quiet volume; do (cd "$work/$name/run/model" && find . -name '*.safetensors' -exec sha256sum {} + | sort -k2) >"$work/$name.sums"; done
diff "$work/quiet.sums" "$work/volume.sums" || fail "the weights differ"
echo "the same $(wc -l <"$work/quiet.sums") files, bit for bit"
[ -z "$(find "$work/volume/run" ! -perm -o=r)" ] || fail "some files cannot be read by another user"
say "all is well"
