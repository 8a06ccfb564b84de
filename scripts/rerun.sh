# shellcheck shell=bash
# Runs the tests, and one that failed alone a second time. Sourced by scripts/test.

# run_tests WHICH RUNNER ARGUMENT...: runs the tests that the arguments mean, by `nextest` or `cargo_test`. If WHICH is
# `rerun-one`, a test that is the only one to fail runs once more, alone: if it passes then, it is named as flaky, and
# is no failure. If WHICH is `rerun-none`, it is one. Where no test runs at all, that is a failure too: a name was
# misspelt. The last line sums up: N passed, N failed, N skipped, and what was flaky.
run_tests() {
    local which=$1 runner=$2 log code=0 failed counts ran passed skipped flaky=
    shift 2
    log=$(mktemp "${TMPDIR:-/tmp}/drayman-tests.XXXXXX")
    "run_by_$runner" "$@" 2>&1 | tee "$log" || code=$?
    sed -i 's/\x1b\[[0-9;]*m//g' "$log" # colours
    mapfile -t failed < <("failed_by_$runner" <"$log")
    counts=$("counts_by_$runner" <"$log")
    rm -f "$log"
    read -r ran passed skipped <<<"$counts" || true
    if [ -z "$counts" ] || [ $((passed + ${#failed[@]})) != "$ran" ]; then
        note "the tests did not come to their end"
        [ "$code" != 0 ] || code=1
        return "$code"
    fi
    if [ "$ran" = 0 ]; then
        note "no test has run: none fits ${*:-what there is}"
        [ "$code" != 0 ] || code=4 # that of nextest
    fi
    if [ "$code" != 0 ] && [ "$which" = rerun-one ] && [ ${#failed[@]} = 1 ]; then
        printf '\nOnly %s has failed: once more, alone\n' "${failed[0]}"
        if "again_by_$runner" "${failed[0]}" "$@"; then
            printf '\n%s\n' '!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!'
            printf 'flaky: %s passed at its second run. Mend it before anything else.\n' "${failed[0]}"
            printf '%s\n' '!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!'
            flaky=", flaky: ${failed[0]}"
            code=0 passed=$((passed + 1)) failed=()
        fi
    fi
    printf '%d passed, %d failed, %d skipped%s\n' "$passed" ${#failed[@]} "$skipped" "$flaky"
    return "$code"
}

# Of each runner: how it runs tests; from its output the failed ones, a line each, and how many ran, passed and were
# skipped, nothing if it did not come to its end; and how it runs one again, which must run then.

run_by_nextest() {
    local colours=()
    [ ! -t 1 ] || colours=(--color always)
    cargo nextest run "${colours[@]}" "$@"
}

# Those named behind the summary, each with its time: `FAIL [   1.234s] (5/9) package::program path::of::test`.
failed_by_nextest() {
    awk '/^ *Summary \[/ { summed = 1; next } summed && /\[[> ]*[0-9.]+s\]/ { print $(NF - 1), $NF }'
}

# `Summary [   1.234s] 9 tests run: 8 passed (1 slow), 1 failed, 2 skipped`; of an interrupted run `8/9 tests run`.
counts_by_nextest() {
    awk '/^ *Summary \[.*\] +[0-9]+ tests? run:/ {
        ran = passed = skipped = 0
        for (i = 2; i <= NF; i++) {
            if ($i ~ /^tests?$/) ran = $(i - 1)
            if ($i ~ /^passed/) passed = $(i - 1)
            if ($i ~ /^skipped/) skipped = $(i - 1)
        }
        counts = ran " " passed " " skipped
    } END { if (counts) print counts }'
}

again_by_nextest() {
    local program=${1% *} test=${1##* }
    shift
    cargo nextest run "$@" -E "binary_id(=$program) & test(=$test)"
}

run_by_cargo_test() { RUST_TEST_THREADS=4 cargo test --no-fail-fast --lib --bins --tests "$@"; }

failed_by_cargo_test() { sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p'; }

# A line `test result:` for each test program. One that lacks its line crashed.
counts_by_cargo_test() {
    awk '/^ +Running .*\(.*\)$/ { programs++ }
        /^test result: / {
            results++
            for (i = 3; i <= NF; i++) {
                if ($i ~ /^passed/) passed += $(i - 1)
                if ($i ~ /^failed/) failed += $(i - 1)
                if ($i ~ /^(ignored|filtered)/) skipped += $(i - 1)
            }
        }
        END { if (programs && programs == results) print passed + failed, passed + 0, skipped + 0 }'
}

again_by_cargo_test() {
    local test=$1 said
    shift
    said=$(cargo test --lib --bins --tests "$@" -- --exact "$test" 2>&1) || {
        printf '%s\n' "$said"
        return 1
    }
    grep -Fqx "test $test ... ok" <<<"$said"
}
