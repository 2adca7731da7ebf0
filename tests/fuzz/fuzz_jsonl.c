/* JSON Lines: any way of reading gives the same bytes, and a point gives them again. */
#include "fuzz.h"

static int fuzz_jsonl(const uint8_t *data, size_t size) {
    data_jsonl whole, parts, again;
    size_t room = 3 * size + 16; /* no escape is shorter than what it stands for */
    unsigned char *a = (unsigned char *)malloc(room), *b = (unsigned char *)malloc(room), one[7];
    FUZZ_CHECK(a && b);
    data_jsonl_from_memory(&whole, data, size);
    size_t n = data_jsonl_read(&whole, a, room);
    FUZZ_CHECK(n < room);
    if (whole.problem) fuzz_check_line(whole.problem);
    data_jsonl_from_memory(&parts, data, size);
    data_jsonl_from_memory(&again, data, size);
    for (size_t done = 0, some = 1; done < n; done += some) {
        data_jsonl_point point = data_jsonl_tell(&parts);
        some = data_jsonl_read(&parts, b + done, done % 7 + 1);
        FUZZ_CHECK(some > 0 && point.decoded <= done && done - point.decoded <= 3);
        data_jsonl_seek(&again, point);
        data_jsonl_read(&again, NULL, done - (size_t)point.decoded);
        FUZZ_CHECK(data_jsonl_read(&again, one, some) == some && memcmp(one, b + done, some) == 0);
    }
    FUZZ_CHECK(memcmp(a, b, n) == 0);
    free(a);
    free(b);
    return 0;
}
